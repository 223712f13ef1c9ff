"""just bench-variant: a small pretrained language model that ships with the repository, adapted from prose to code.

bench      the command              run     settings, training, one run of a variant      tasks   code, and MetaMathQA -> GSM8K
report     its table and plot       sweep   learning rates on a validation part           full    every weight trained, the peer
pretrain   how the base was made    tokenizer  bytes as tokens
"""
