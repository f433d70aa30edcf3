"""Architectures of transformers, each as a tiny random model with two blocks of width 48."""

import functools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import architectures
import torch
import transformers
from torch import Tensor, nn

SIZES = {"hidden_size": 48, "num_attention_heads": 4, "intermediate_size": 64}
KV = {"num_key_value_heads": 2}
HEADS = {**KV, "head_dim": 12}
EXPERTS = {**architectures.EXPERTS, **KV, "moe_intermediate_size": 16}
SHARED = {**EXPERTS, "shared_expert_intermediate_size": 16, "n_shared_experts": 1}
GROUPS = {"first_k_dense_replace": 1, "n_group": 1, "topk_group": 1}
STATES = {"state_size": 8, "time_step_rank": 8}
STATES2 = {"state_size": 8, "num_heads": 8, "head_dim": 12, "n_groups": 1, "chunk_size": 4}
LINEAR = {"linear_num_key_heads": 2, "linear_num_value_heads": 2, "linear_key_head_dim": 12,
          "linear_value_head_dim": 12,
          "layer_types": ["linear_attention", "full_attention"]}  # fmt: skip
ENCODER_DECODER = {"d_model": 48, "decoder_start_token_id": 0}
IMAGES = {"image_size": 16, "patch_size": 8, "num_channels": 3, "num_labels": 3}
IDS = torch.tensor([[5, 9, 30, 7, 11, 2], [8, 31, 6, 14, 21, 2]])
PARAMETERS = "matrices that are parameters of the attention itself"
CONVOLUTIONS = "convolutions"
STATE = "a convolution and the state's own parameter"
READ = "code reads the weight"
NAMES = "PEFT takes the name of .* for that of experts"
OUTPUTS = "PEFT adapts no out_proj of a mamba2"


@dataclass(frozen=True)
class Entry:
    """One architecture.

    Args:
        kind: transformers' type of model.
        auto: the end of the class that builds it: AutoModelFor<auto>, or AutoModel.
        sizes: of its configuration.
        least: of the inner matrix weights, the share that all-linear must reach, and `left`, what
            the rest is where that is below 0.95.
        always: the test runs always, not only where CI runs what is long.
        not_peft: the reason why peft cannot hold its adapter, or the beginning of it.
    """

    kind: str
    auto: str = "ForCausalLM"
    sizes: Mapping[str, Any] = field(default_factory=dict)
    least: float = 0.95
    left: str = ""
    always: bool = False
    not_peft: str = ""

    def model(self) -> transformers.PreTrainedModel:
        """A new model in evaluation mode, with no parameter at the value that it starts from."""
        sizes = {**architectures.SIZES, **SIZES, **self.sizes}
        config = transformers.AutoConfig.for_model(
            self.kind, **{k: v for k, v in sizes.items() if v is not None}
        )
        if "Classification" in self.auto:
            config.num_labels = 3
        torch.manual_seed(0)
        model = self.auto_class.from_config(config).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.ndim > 1:
                    parameter.normal_(0, 0.2)
                else:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        return model

    @property
    def auto_class(self) -> Any:
        return getattr(transformers, f"AutoModel{self.auto}")

    def inputs(self) -> dict[str, Tensor]:
        draw = torch.Generator().manual_seed(3)
        if self.kind == "whisper":
            return {"input_features": torch.randn(2, 8, 40, generator=draw),
                    "decoder_input_ids": IDS}  # fmt: skip
        if self.kind == "wav2vec2":
            return {"input_values": torch.randn(2, 400, generator=draw)}
        pixels = {"pixel_values": torch.randn(2, 3, 16, 16, generator=draw)}
        if self.auto == "ForImageClassification":
            return pixels
        text = {"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}
        if self.kind == "clip":
            return text | pixels
        return text | ({"decoder_input_ids": IDS} if self.auto == "ForSeq2SeqLM" else {})


def output(model: nn.Module, entry: Entry) -> Tensor:
    """The model's answer: logits, whatever they are called."""
    answer = model(**entry.inputs())
    names = ("logits", "logits_per_image", "last_hidden_state")
    return next(answer[name] for name in names if name in answer)


classifier = functools.partial(Entry, auto="ForSequenceClassification")
images = functools.partial(Entry, auto="ForImageClassification", least=0.7, left=CONVOLUTIONS)

ZOO = {
    # causal language models
    "gpt2": Entry("gpt2", always=True),
    "openai-gpt": Entry("openai-gpt"),
    "gpt_neo": Entry("gpt_neo", sizes={"attention_types": [[["global", "local"], 1]],
                                       "num_layers": 2, "num_heads": 4, "window_size": 8}),
    "gpt_neox": Entry("gpt_neox"),
    "gptj": Entry("gptj", sizes={"rotary_dim": 4}),
    "opt": Entry("opt", sizes={"ffn_dim": 64, "word_embed_proj_dim": 48}),
    "bloom": Entry("bloom", sizes={"n_head": 4, "n_layer": 2}),
    "falcon": Entry("falcon", always=True, sizes={"new_decoder_architecture": False,
                                                  "parallel_attn": True}),
    "mpt": Entry("mpt", sizes={"d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 64}),
    "llama": Entry("llama", sizes=KV, always=True),
    "llama_tied": Entry("llama", sizes={**KV, "tie_word_embeddings": True}),
    "mistral": Entry("mistral", sizes=KV),
    "mixtral": Entry("mixtral", sizes=EXPERTS, always=True),
    "qwen2": Entry("qwen2", sizes=KV),
    "qwen3": Entry("qwen3", sizes=HEADS),
    "qwen2_moe": Entry("qwen2_moe", sizes=SHARED),
    "qwen3_moe": Entry("qwen3_moe", sizes={**EXPERTS, **HEADS}),
    "gemma": Entry("gemma", sizes=HEADS),
    "gemma2": Entry("gemma2", sizes={**HEADS, "sliding_window": 8, "query_pre_attn_scalar": 12}),
    "gemma3_text": Entry("gemma3_text", sizes={**HEADS, "sliding_window": 8}),
    "phi": Entry("phi", sizes=KV),
    "phi3": Entry("phi3", sizes=KV),
    "granite": Entry("granite", sizes=KV),
    "granitemoe": Entry("granitemoe", sizes=EXPERTS),
    "olmo2": Entry("olmo2", sizes=KV),
    "olmoe": Entry("olmoe", sizes=EXPERTS),
    "cohere": Entry("cohere", sizes=KV),
    "cohere2": Entry("cohere2", sizes={**KV, "sliding_window": 8}),
    "starcoder2": Entry("starcoder2", sizes=KV),
    "stablelm": Entry("stablelm", sizes={**KV, "partial_rotary_factor": 0.5}),
    "deepseek_v3": Entry("deepseek_v3", not_peft=NAMES, sizes={
        **SHARED, **GROUPS, "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8, "v_head_dim": 12, "num_key_value_heads": 4}),
    "gpt_oss": Entry("gpt_oss", sizes={**EXPERTS, **HEADS, "sliding_window": 8}),
    "mamba": Entry("mamba", always=True, sizes=STATES, least=0.9, left=STATE, not_peft=READ),
    "mamba2": Entry("mamba2", sizes=STATES2, not_peft=OUTPUTS),
    "falcon_mamba": Entry("falcon_mamba", sizes=STATES, least=0.9, left=STATE, not_peft=READ),
    "rwkv": Entry("rwkv", sizes={"attention_hidden_size": 48, "context_length": 32,
                                 "rescale_every": 0, "use_cache": False}),
    "bamba": Entry("bamba", sizes={
        **KV, "attn_layer_indices": [1], "mamba_n_heads": 8, "mamba_d_head": 12,
        "mamba_d_state": 8, "mamba_n_groups": 1, "mamba_chunk_size": 4}),
    "jamba": Entry("jamba", always=True, not_peft=READ, sizes={
        **EXPERTS, "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2,
        "expert_layer_offset": 1, "mamba_d_state": 8, "mamba_dt_rank": 8,
        "use_mamba_kernels": False}),
    "smollm3": Entry("smollm3", sizes=KV),
    "glm4": Entry("glm4", sizes=HEADS),
    "dbrx": Entry("dbrx", not_peft="is read from outside its module", sizes={
        "d_model": 48, "n_heads": 4, "n_layers": 2, "max_seq_len": 64,
        "attn_config": {"kv_n_heads": 2, "rope_theta": 10000.0, "clip_qkv": 8.0},
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2,
                       "hidden_size": 48}}),
    "xglm": Entry("xglm", sizes={"d_model": 48, "ffn_dim": 64, "num_layers": 2,
                                 "attention_heads": 4}),
    "gpt_bigcode": Entry("gpt_bigcode"),
    "codegen": Entry("codegen", sizes={"rotary_dim": 4}),
    "llama4_text": Entry("llama4_text", always=True, sizes={
        **EXPERTS, **HEADS, "intermediate_size_mlp": 64}),
    "qwen3_next": Entry("qwen3_next", not_peft=NAMES, sizes={**SHARED, **HEADS, **LINEAR}),
    "glm4_moe": Entry("glm4_moe", not_peft=NAMES, sizes={**SHARED, **HEADS, **GROUPS}),
    "phimoe": Entry("phimoe", sizes=EXPERTS),
    "nemotron": Entry("nemotron", sizes=KV),
    "recurrent_gemma": Entry("recurrent_gemma", sizes={
        **HEADS, "lru_width": 48, "attention_window_size": 8,
        "block_types": ["recurrent", "attention"], "use_cache": False},
        least=0.9, left="gates that are 3-D parameters"),
    "lfm2": Entry("lfm2", sizes={**KV, "layer_types": ["conv", "full_attention"],
                                 "block_multiple_of": 8}),
    "jetmoe": Entry("jetmoe", sizes={**EXPERTS, "kv_channels": 12}),
    # encoders
    "bert": classifier("bert", always=True),
    "roberta": classifier("roberta"),
    "xlm-roberta": classifier("xlm-roberta"),
    "camembert": classifier("camembert"),
    "mpnet": classifier("mpnet"),
    "distilbert": classifier("distilbert", sizes={"dim": 48, "n_heads": 4, "hidden_dim": 64}),
    "albert": classifier("albert", sizes={"embedding_size": 16}),
    "electra": classifier("electra", sizes={"embedding_size": 16}),
    "deberta": classifier("deberta", always=True, sizes={
        "pos_att_type": ["p2c", "c2p"], "relative_attention": True}),
    "deberta-v2": classifier("deberta-v2", sizes={
        "relative_attention": True, "pos_att_type": ["p2c", "c2p"], "position_buckets": 8,
        "share_att_key": True}),
    "modernbert": classifier("modernbert", sizes={"global_attn_every_n_layers": 2,
                                                  "local_attention": 8}),
    "eurobert": classifier("eurobert", sizes=KV),
    "funnel": classifier("funnel", sizes={"d_model": 48, "n_head": 4, "d_head": 12, "d_inner": 64,
                                          "block_sizes": [1, 1], "num_hidden_layers": None},
                         least=0.85, left=PARAMETERS),
    "xlnet": classifier("xlnet", sizes={"d_model": 48, "n_layer": 2, "n_head": 4, "d_inner": 64,
                                        "max_position_embeddings": None},
                        least=0.3, left=PARAMETERS),
    "esm": classifier("esm", sizes={"position_embedding_type": "rotary", "mask_token_id": 4}),
    "longformer": Entry("longformer", "ForTokenClassification", sizes={"attention_window": 4,
                                                  "max_position_embeddings": 40}),
    "big_bird": classifier("big_bird", sizes={"block_size": 4, "num_random_blocks": 1}),
    # encoder-decoders
    "t5": Entry("t5", "ForSeq2SeqLM", sizes={**ENCODER_DECODER, "d_kv": 12, "d_ff": 64,
                                             "num_layers": 2, "num_heads": 4}, always=True),
    "t5, classifier": classifier("t5", sizes={**ENCODER_DECODER, "d_kv": 12, "d_ff": 64,
                                              "num_layers": 2, "num_heads": 4}),
    "bart": Entry("bart", "ForSeq2SeqLM", sizes={
        **ENCODER_DECODER, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}),
    "bart, classifier": classifier("bart", sizes={
        **ENCODER_DECODER, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64}),
    # vision and speech
    "vit": images("vit", sizes=IMAGES),
    "convnext": images("convnext", sizes={**IMAGES, "patch_size": 2, "depths": [1, 1],
                                          "hidden_sizes": [16, 48], "num_stages": 2}),
    "swin": images("swin", sizes={**IMAGES, "patch_size": 2, "depths": [1, 1], "num_heads": [2, 4],
                                  "embed_dim": 24, "window_size": 4,
                                  "hidden_size": None, "num_attention_heads": None,
                                  "num_hidden_layers": None}),
    "clip": Entry("clip", "", least=0.85, left=CONVOLUTIONS, sizes={
        "projection_dim": 48,
        "text_config": {**architectures.SIZES, **SIZES},
        "vision_config": {**SIZES, **IMAGES, "num_hidden_layers": 2}}),
    "whisper": Entry("whisper", "ForSpeechSeq2Seq", least=0.9, left=CONVOLUTIONS, sizes={
        **ENCODER_DECODER, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
        "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64,
        "num_mel_bins": 8, "max_source_positions": 20, "max_target_positions": 32}),
    "wav2vec2": Entry("wav2vec2", "ForCTC", always=True, least=0.85, left=CONVOLUTIONS, sizes={
        "conv_dim": [16, 16], "conv_kernel": [10, 3], "conv_stride": [5, 2],
        "num_feat_extract_layers": 2, "num_conv_pos_embeddings": 8,
        "num_conv_pos_embedding_groups": 4}),
}  # fmt: skip
