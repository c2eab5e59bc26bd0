"""Byte-complete tokenizers, trained here or elsewhere, whose special tokens ordinary text can never produce."""

from tokenizer.base import Tokenizer
from tokenizer.hf_bbpe import HFBBPETokenizer
from tokenizer.loading import load_tokenizer
from tokenizer.sp_bbpe import SPBBPETokenizer

__all__ = ["HFBBPETokenizer", "SPBBPETokenizer", "Tokenizer", "load_tokenizer"]
