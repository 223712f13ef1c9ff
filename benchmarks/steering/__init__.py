"""just steering: one direction from labelled text, removed from and added to the embedded base.

bench    the command    report    its table, plot and sentences
"""
