"""Words for people: text escaped for where it goes, URLs without their secrets, units, and tables that fit."""
