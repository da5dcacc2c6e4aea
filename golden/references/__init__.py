"""Implementations that goldens are recorded from. Importing this imports none of them."""
