#!/bin/sh
# Builds the image where there is no container registry: debootstrap makes the base, buildah the rest. Run as root.
#
#   docker/build.sh [cpu|gpu|database|base] [more options for `buildah build`]
#
# Taken from the system: Debian's mirror (from apt), pip's index and certificates (from pip's configuration).
# Settings, all from the environment:
#   TAG       the image's name                                              hilum:cpu, hilum:gpu, hilum:database
#   SUITE     the Debian release of the base                                bookworm
#   MIRROR    its mirror, where apt's own is not the one to use
#   PIP_ARGS  more for pip, e.g. an index that has torch without CUDA
#   WHEELS    a folder of wheels, seen by pip as /wheels (PIP_ARGS="--no-index --find-links /wheels": no index at all)
set -eu

target=${1:-cpu}
[ $# -eq 0 ] || shift
case $target in
    cpu | gpu | database | base) ;;
    *) echo "build.sh: target '$target' was met; cpu, gpu, database or base is needed. Name one of them." >&2; exit 2 ;;
esac
for tool in buildah debootstrap; do
    command -v "$tool" >/dev/null ||
        { echo "build.sh: no $tool was found; it is needed. Try: apt-get install buildah debootstrap" >&2; exit 2; }
done

suite=${SUITE:-bookworm}
base=localhost/hilum-base:$suite
repository=$(cd "$(dirname "$0")/.." && pwd)
scratch=$(mktemp -d "${TMPDIR:-/var/tmp}/hilum-image.XXXXXX")
trap 'rm -rf --one-file-system "$scratch"' EXIT
trap 'exit 130' INT TERM

make_base() {
    root=$scratch/root
    apt_sources >"$scratch/sources.list"
    mirror=${MIRROR:-$(awk -v suite="$suite" '$3 == suite { print $2; exit }' "$scratch/sources.list")}
    # where no mirror is known, debootstrap takes its own
    env -u TMPDIR debootstrap --variant=minbase --include=ca-certificates,python3,python3-venv \
        "$suite" "$root" ${mirror:+"$mirror"}
    [ -n "${MIRROR:-}" ] || update "$root"
    rm -rf "$root/var/cache/apt" "$root/var/lib/apt/lists" "$root/etc/apt/sources.list" "$root/etc/resolv.conf" \
        "$root/var/log"/*.log
    mkdir -p "$root/var/cache/apt/archives/partial" "$root/var/lib/apt/lists/partial"
    container=$(buildah from scratch)
    buildah add --quiet "$container" "$root" / >/dev/null
    buildah config --cmd /bin/bash "$container"
    buildah commit --quiet --rm "$container" "$base" >/dev/null
    rm -rf "$root"
}

apt_sources() {  # apt's own sources of this release: the mirror, its updates and, where there is one, security
    command -v apt-get >/dev/null || return 0
    # shellcheck disable=SC2016  # apt fills these in
    apt-get indextargets --format 'deb $(REPO_URI) $(CODENAME) $(COMPONENT)' 'Created-By: Packages' 'Origin: Debian' |
        awk -v suite="$suite" '$4 == "main" && ($3 == suite || $3 == suite "-security" || $3 == suite "-updates")' | sort -u
}

update() {  # debootstrap itself knows no security updates
    [ -s "$scratch/sources.list" ] || return 0
    cp "$scratch/sources.list" "$1/etc/apt/sources.list"
    env -u TMPDIR DEBIAN_FRONTEND=noninteractive chroot "$1" sh -ec 'apt-get -q update; apt-get -qy upgrade'
}

pip_configuration() {  # the index and whom to trust, as pip's files and environment here say; the environment wins
    keys='index-url|extra-index-url|no-index|trusted-host|cert|client-cert|proxy|timeout|default-timeout|retries'
    echo "[global]"
    python3 -m pip config list 2>/dev/null |
        sed -nE "s/^(:env:|user|site|global)\.($keys)='(.*)'\$/\2 = \3/p" | sed 's/\\n/ /g' | sort -s -u -t= -k1,1
}

buildah inspect --type image "$base" >/dev/null 2>&1 || make_base
[ "$target" != base ] || exit 0
(umask 077 && pip_configuration >"$scratch/pip.conf")
apt_sources >"$scratch/sources.list"

# npm knows its registry on this machine, not in the build: what lies in the checkout is not fetched there again
python3 "$repository/pipeline/outputs/_viewer/build.py" || true

# Certificates: pip in the build trusts whom this machine trusts; Postgres's packages put one of their own beside them, so
# that these are laid over the image's and not mounted for reading alone. `--format docker`: OCI's has no HEALTHCHECK. No
# `--layers`: buildah 1.28 then takes a layer from its cache although the stage that is mounted in it is another.
certificates=/etc/ssl/certs:/etc/ssl/certs:ro
[ "$target" != database ] || certificates=/etc/ssl/certs:/etc/ssl/certs:O
buildah build --pull-never --format docker --target "$target" --file "$repository/docker/Dockerfile" \
    --build-arg "BASE=$base" --build-arg "PIP_ARGS=${PIP_ARGS:-}" --secret "id=pip,src=$scratch/pip.conf" \
    --secret "id=apt,src=$scratch/sources.list" \
    --volume "$certificates" ${WHEELS:+--volume "$WHEELS:/wheels:ro"} \
    --tag "${TAG:-hilum:$target}" "$@" "$repository"
