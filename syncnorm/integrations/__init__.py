"""Other libraries' hooks for our layers, one file each, which is imported by those who need it and
not before.
"""
