"""PEFT folders, both ways: how PEFT stores each method, writing such folders, attaching what they hold."""
