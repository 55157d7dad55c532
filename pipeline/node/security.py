"""TLS as PS3.15 wants it today: both sides show a certificate, and nothing older than TLS 1.2 is spoken."""

import ssl

from .config import Security


def server_side(security: Security) -> ssl.SSLContext:
    """For those who call: without a certificate of the authority nobody gets a word in."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.verify_mode = ssl.CERT_REQUIRED
    return _with_certificates(context, security)


def client_side(security: Security) -> ssl.SSLContext:
    """For those who are called: they must be who the config says, by name or address."""
    return _with_certificates(ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT), security)


def _with_certificates(context: ssl.SSLContext, security: Security) -> ssl.SSLContext:
    # BCP 195 RFC 9325, which PS3.15 B.12 takes over: 1.2 at the least
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    context.load_cert_chain(security.certificate, security.key)
    context.load_verify_locations(security.authority)
    return context
