"""``python -m retrodict``: the same as the command ``retrodict``."""

from retrodict.cli.main import main

raise SystemExit(main())
