"""``python -m dsv4_convert`` is ``dsv4``."""

from dsv4_convert.cli import main

main()
