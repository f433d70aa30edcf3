"""A Llama in a GGUF file, written out as an ordinary transformers folder in float32.

The file's format is llama.cpp's (ggml-org/ggml, docs/gguf.md); the package `gguf`, of the same
authors, reads and dequantises it. Three things are not as transformers has them:

- Rotary pairs. llama.cpp turns neighbouring rows (2j, 2j + 1) of a head by one angle, transformers
  rows (j, j + d/2): the converter reordered the rows of q and k, and `half_split` puts them back.
- Numbers. Its floats are float32, so that 1e-5 reads 9.999999747378752e-06.
- Text. Of the tokenizer it names the rule that splits text before BPE, and does not hold it. The
  rule "smollm" is llama.cpp's pair of regular expressions: every digit alone, then GPT-2's.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from einops import rearrange
from safetensors.torch import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import GenerationConfig, LlamaConfig, PreTrainedTokenizerFast

# Tensor of a GGUF -> parameter of LlamaForCausalLM, outside the layers and inside layer N.
OUTSIDE = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",  # absent if tied to the embedding
}
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
CONTROL = 3  # the token type of <|im_start|> and the like


def convert(file: Path, folder: Path) -> None:
    """Write model.safetensors, the configurations and the tokenizer of `file` into a folder."""
    from gguf import GGUFReader, dequantize

    reader = GGUFReader(file)
    metadata = {key: field.contents() for key, field in reader.fields.items()}
    config = llama_config(metadata, tied=all(t.name != "output.weight" for t in reader.tensors))
    heads = {
        "attn_q": config.num_attention_heads,
        "attn_k": config.num_key_value_heads or config.num_attention_heads,
    }
    tensors: dict[str, Tensor] = {}
    for stored in reader.tensors:
        values = np.array(dequantize(stored.data, stored.tensor_type), dtype=np.float32)
        tensor = torch.from_numpy(values)
        role = stored.name.removesuffix(".weight").rpartition(".")[2]
        if role in heads:
            tensor = half_split(tensor, heads[role])
        tensors[parameter_name(stored.name)] = tensor.contiguous()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config.save_pretrained(folder)
    special = {key: getattr(config, key) for key in SPECIAL}
    GenerationConfig(**special).save_pretrained(folder)
    bpe_tokenizer(metadata).save_pretrained(folder)


def parameter_name(name: str) -> str:
    """blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    *path, role, kind = name.split(".")
    if not path:
        return f"{OUTSIDE[role]}.{kind}"
    _, layer = path
    return f"model.layers.{layer}.{LAYER[role]}.{kind}"


def half_split(weight: Tensor, heads: int) -> Tensor:
    """Rows of q or k (heads d, i) from llama.cpp's order of rotary pairs to transformers'."""
    return rearrange(weight, "(h j pair) i -> (h pair j) i", h=heads, pair=2)


def llama_config(metadata: dict[str, Any], *, tied: bool) -> LlamaConfig:
    """The configuration of transformers, with what a classifier's head is drawn from.

    The width of the initial weights is not in the file: SmolLM2's is 1 / sqrt(hidden size).
    """
    assert metadata["general.architecture"] == "llama", metadata["general.architecture"]

    def get(key: str) -> Any:
        return metadata[f"llama.{key}"]

    return LlamaConfig(
        architectures=["LlamaForCausalLM"],
        vocab_size=get("vocab_size"),
        hidden_size=get("embedding_length"),
        intermediate_size=get("feed_forward_length"),
        num_hidden_layers=get("block_count"),
        num_attention_heads=get("attention.head_count"),
        num_key_value_heads=get("attention.head_count_kv"),
        head_dim=get("rope.dimension_count"),
        max_position_embeddings=get("context_length"),
        rms_norm_eps=as_written(get("attention.layer_norm_rms_epsilon")),
        rope_parameters={
            "rope_type": "default",
            "rope_theta": as_written(get("rope.freq_base")),
        },
        initializer_range=get("embedding_length") ** -0.5,
        tie_word_embeddings=tied,
        bos_token_id=metadata["tokenizer.ggml.bos_token_id"],
        eos_token_id=metadata["tokenizer.ggml.eos_token_id"],
        pad_token_id=metadata["tokenizer.ggml.padding_token_id"],
        dtype="float32",
    )


def as_written(value: float) -> float:
    """The shortest decimal number that a float32 stands for."""
    return float(str(np.float32(value)))


def bpe_tokenizer(metadata: dict[str, Any]) -> PreTrainedTokenizerFast:
    """The byte-level BPE tokenizer, with its special tokens and chat template.

    SmolLM2's vocabulary lacks some bytes, which are control characters or no text at all: they
    leave no token.
    """

    def get(key: str) -> Any:
        return metadata[f"tokenizer.ggml.{key}"]

    assert (get("model"), get("pre")) == ("gpt2", "smollm"), (get("model"), get("pre"))
    assert not get("add_bos_token") and not get("add_space_prefix")
    tokens = get("tokens")
    merges = [(left, right) for left, right in (merge.split(" ") for merge in get("merges"))]
    vocabulary = {token: index for index, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    kinds = zip(tokens, get("token_type"), strict=True)
    tokenizer.add_special_tokens([token for token, kind in kinds if kind == CONTROL])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=tokens[get("bos_token_id")],
        eos_token=tokens[get("eos_token_id")],
        unk_token=tokens[get("unknown_token_id")],
        pad_token=tokens[get("padding_token_id")],
        model_max_length=metadata["llama.context_length"],
        chat_template=metadata["tokenizer.chat_template"],
        clean_up_tokenization_spaces=False,
    )
