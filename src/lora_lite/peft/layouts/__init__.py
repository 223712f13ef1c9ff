"""PEFT's layouts of the methods it has too, one file each, called like the variant; see peft.layout.Layout."""
