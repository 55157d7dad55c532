"""python -m pipeline: the same as the command `hilum`."""

from .cli import main

raise SystemExit(main())
