"""Tiny random models of transformers' architectures, with disturbed weights."""

import functools

import torch
import transformers

WIDTH = 16
SIZES = {
    "vocab_size": 40,
    "hidden_size": WIDTH,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 32,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
EXPERTS = {
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 8,
}


def causal(kind, **sizes):
    return transformers.AutoModelForCausalLM.from_config(config_of(kind, **sizes))


def classifier(kind, **sizes):
    config = config_of(kind, **sizes, num_labels=3)
    return transformers.AutoModelForSequenceClassification.from_config(config)


def config_of(kind, **sizes):
    given = {key: value for key, value in {**SIZES, **sizes}.items() if value is not None}
    return transformers.AutoConfig.for_model(kind, **given)


# Name -> how it is built. Each has code that reads a weight, writes an output in place, asks for
# values on its way, or has linear layers that are none.
MODELS = {
    "falcon": lambda: causal("falcon", new_decoder_architecture=False, parallel_attn=True),
    "deberta": lambda: classifier("deberta", pos_att_type=["p2c", "c2p"], relative_attention=True),
    "llama4": lambda: causal(
        "llama4_text", **EXPERTS, intermediate_size_mlp=24, num_key_value_heads=2, head_dim=8
    ),
    "phimoe": lambda: causal("phimoe", **EXPERTS, num_key_value_heads=2),
    "t5": lambda: classifier(
        "t5", d_model=WIDTH, d_kv=8, d_ff=24, num_layers=2, num_heads=2, decoder_start_token_id=0
    ),
    "mamba": lambda: causal("mamba", state_size=4, time_step_rank=3),
    "mamba2": lambda: causal(
        "mamba2", state_size=4, num_heads=4, head_dim=8, n_groups=1, expand=2, chunk_size=4
    ),
    "jamba": lambda: causal(
        "jamba", **EXPERTS, num_key_value_heads=2, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, mamba_d_state=4, mamba_dt_rank=3,
        use_mamba_kernels=False,
    ),
    "bamba": lambda: causal(
        "bamba", num_key_value_heads=2, attn_layer_indices=[1], mamba_n_heads=4, mamba_d_head=8,
        mamba_d_state=4, mamba_n_groups=1, mamba_chunk_size=4,
    ),
    "qwen3_next": lambda: causal(
        "qwen3_next", **EXPERTS, num_key_value_heads=2, head_dim=8, linear_num_key_heads=2,
        linear_num_value_heads=2, linear_key_head_dim=8, linear_value_head_dim=8,
        shared_expert_intermediate_size=8, layer_types=["linear_attention", "full_attention"],
    ),
    "gemma3": lambda: multimodal(),
    "esm": lambda: classifier("esm", position_embedding_type="rotary", mask_token_id=4),
    "jetmoe": lambda: causal("jetmoe", **EXPERTS, num_key_value_heads=2, kv_channels=8),
    "gpt_neox": lambda: causal("gpt_neox"),
    "bart": lambda: classifier(
        "bart", d_model=WIDTH, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24,
    ),
    "xlnet": lambda: classifier(
        "xlnet", d_model=WIDTH, n_layer=2, n_head=2, d_inner=24, max_position_embeddings=None
    ),
}  # fmt: skip


BUILT = {
    **MODELS,
    "bert": lambda: classifier("bert"),
    "gpt2": lambda: causal("gpt2"),
    "llama": lambda: causal("llama"),
    "opt": lambda: causal("opt", ffn_dim=24, word_embed_proj_dim=16),
    "bloom": lambda: causal("bloom", n_head=2, n_layer=2),
}


def multimodal(vocab_size=40):
    """Gemma 3 with a vision tower, which a text does not pass through."""
    text = {
        **SIZES,
        "vocab_size": vocab_size,
        "num_key_value_heads": 1,
        "head_dim": 8,
        "sliding_window": 8,
    }
    vision = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1,
              "num_attention_heads": 2, "image_size": 8, "patch_size": 4}  # fmt: skip
    names = ("boi_token_id", "eoi_token_id", "image_token_id")
    config = transformers.Gemma3Config(
        text_config=text, vision_config=vision, eos_token_id=2, mm_tokens_per_image=1,
        **{name: vocab_size - 1 - index for index, name in enumerate(names)},
    )  # fmt: skip
    return transformers.AutoModelForCausalLM.from_config(config)


@functools.cache
def plain(name):
    torch.manual_seed(0)
    model = MODELS[name]().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.3)
    return model


def loss_of(model):
    ids = torch.tensor([[5, 9, 30, 7, 11, 2], [8, 31, 6, 14, 21, 2]])
    logits = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits
    return logits, logits.float().square().mean()
