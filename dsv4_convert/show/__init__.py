"""What people read: text that is escaped for where it goes, URLs without their secrets, units, and tables that fit."""
