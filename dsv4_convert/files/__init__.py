"""Handling of files of any kind.

- :mod:`.workspace`: where a destination grows until it is complete: its lock, its stage, resuming, publishing.
- :mod:`.writing`: a file that appears whole or not at all, and durably.
- :mod:`.reading`: what a path really is; :mod:`.strict_json`: JSON that all readers understand alike.
- :mod:`.remote`: a folder behind a URL, bounded in bytes and in time.
- :mod:`.limits`: disk and address space, asked before work begins.
"""
