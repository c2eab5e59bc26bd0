"""Byte-level tokenizers, trained here, whose special tokens ordinary text can never produce."""

from tokenizer.hf_bbpe import HFBBPETokenizer, load_tokenizer

__all__ = ["HFBBPETokenizer", "load_tokenizer"]
