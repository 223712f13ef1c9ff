"""One file for each method: its formula, its source, its options, its mathematics, and nothing else.

A file imports from the doors of contract, mathematics, families and calibration; it registers itself when it is imported, and
the registry imports every file of this folder. No other place of the library says a method's name.
"""
