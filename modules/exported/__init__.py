"""How each sort of trained editor is written to a folder and read again (see modules/export.py)."""
