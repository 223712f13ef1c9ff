"""The embedded base's tokenizer: a token is a byte and its id is the byte's value."""

from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast


def byte_characters() -> list[str]:
    """The printable character that byte-level tokenizers write for each of the 256 bytes."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = iter(range(256, 512))
    return [chr(byte if byte in printable else next(others)) for byte in range(256)]


def save_tokenizer(folder: Path) -> None:
    """Write tokenizer files that AutoTokenizer reads; byte 0 serves as padding and end of text."""
    characters = byte_characters()
    tokenizer = Tokenizer(models.BPE(vocab={c: byte for byte, c in enumerate(characters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=characters[0], pad_token=characters[0])
    wrapped.save_pretrained(folder)
