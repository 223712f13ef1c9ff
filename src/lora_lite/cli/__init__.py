"""python -m lora_lite: main.py reads the words, folders.py works on folders of models; `new` fills in lora_lite/templates.

It promises nothing that the public functions do not: a command is a call of theirs. A variant's author needs none of it.
"""
