"""A llama's folder as a GGUF, the file that llama.cpp reads. Only for measurements: its tokenizer is a stand-in, whose
tokens are their own numbers, so llama.cpp must be given token ids, and its text tells which ids it answers.

    python -m benchmarks.gguf_file FOLDER model.gguf --dtype float32
"""

import sys

if __name__ == "__main__":
    # Works when the file is run by its path, and by a Python that lacks the packages.
    sys.path[0] = __file__.rsplit("/", 2)[0]
    from utils import environment

    environment.check()

import argparse
from pathlib import Path

import torch
from torch import Tensor

from model import Decoder, ModelConfig, hf
from utils.terminal import run_main


def check(config: ModelConfig) -> None:
    """
    Raises:
        ValueError: the model is not a plain llama.
    """
    plain = ModelConfig(
        **{
            name: getattr(config, name)
            for name in (
                "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
                "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "rope_theta",
                "tie_word_embeddings", "initializer_range",
            )
        }
    ).resolve()  # fmt: skip
    if hf.to_hf_config(plain, torch.float32) != hf.to_hf_config(config, torch.float32):
        raise ValueError("only a llama without biases, windows and scaled positions is written as a GGUF: give another")


def write(folder: Path, path: Path, dtype: torch.dtype) -> None:
    """Write the model of a folder.

    Args:
        dtype: of the matrices, float32 or bfloat16; vectors are float32.
    Raises:
        ValueError: the model is not a plain llama.
    """
    import gguf

    config = hf.read_config(folder)
    check(config)
    model = Decoder(config)
    hf.load_weights(model, folder)
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(config.head_dim)
    writer.add_value_length(config.head_dim)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_theta)
    writer.add_vocab_size(config.vocab_size)
    is_narrow = dtype == torch.bfloat16
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_BF16 if is_narrow else gguf.LlamaFileType.ALL_F32)
    _add_stand_in(writer, config.vocab_size)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, weight in hf.named_weights(model).items():
        values = _as_llama_cpp(name, weight.detach(), config.head_dim)
        its_name = names.get_name(name, (".weight",))
        if is_narrow and values.dim() == 2:
            bits = values.bfloat16().contiguous().view(torch.uint8).numpy()
            writer.add_tensor(its_name, bits, raw_dtype=gguf.GGMLQuantizationType.BF16)
        else:
            writer.add_tensor(its_name, values.float().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _as_llama_cpp(name: str, weight: Tensor, head_dim: int) -> Tensor:
    """llama.cpp rotates neighbours, (0, 1), (2, 3), ..., where a llama's folder rotates halves, (0, D / 2), ..."""
    if not name.endswith(("q_proj.weight", "k_proj.weight")):
        return weight
    return weight.unflatten(0, (-1, 2, head_dim // 2)).transpose(1, 2).flatten(0, 2).contiguous()


def token_of(token_id: int) -> str:
    """Text of a token of the stand-in."""
    return f"<{token_id}>"


def ids_of(text: str) -> list[int]:
    """Tokens of a text of the stand-in."""
    return [int(number) for number in text.removeprefix("<").removesuffix(">").split("><")] if text else []


def _add_stand_in(writer, vocab_size: int) -> None:
    import gguf

    writer.add_tokenizer_model("llama")
    writer.add_token_list([token_of(token_id) for token_id in range(vocab_size)])
    writer.add_token_scores([0.0] * vocab_size)
    # User-defined tokens are written out as they are.
    writer.add_token_types([gguf.TokenType.USER_DEFINED] * vocab_size)
    writer.add_add_bos_token(False)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("path", type=Path)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    args = parser.parse_args(argv)
    write(args.folder, args.path, getattr(torch, args.dtype))


if __name__ == "__main__":
    run_main(main)
