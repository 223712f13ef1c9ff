"""PEFT's folders, both ways: `ll.export_peft` and `ll.load_peft`.

A layout (layouts/, one file for each method that PEFT has too) says which of PEFT's keys and options hold which tensor of ours;
it promises the same function on both sides, or an error that names what differs. A variant's author writes a layout where PEFT
has the method.
"""
