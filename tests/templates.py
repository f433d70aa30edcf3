"""Tokenizers with merges, of the kinds that checkpoints bring, and the chat templates of Llama 3,
ChatML, Zephyr, Gemma and Mistral, written from what those models have."""

import re

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

# The templates of the models they are called after, an answer and its end in a generation block,
# which changes no text.
LLAMA3 = (
    "{{- bos_token }}{%- if not date_string is defined %}{%- if strftime_now is defined %}"
    "{%- set date_string = strftime_now('%d %b %Y') %}{%- endif %}{%- endif %}"
    "{%- if messages[0]['role'] == 'system' %}{%- set system_message = messages[0]['content']|trim"
    " %}{%- set messages = messages[1:] %}{%- else %}{%- set system_message = '' %}{%- endif %}"
    "{{- '<|start_header_id|>system<|end_header_id|>\n\nToday Date: ' + date_string + '\n\n' }}"
    "{{- system_message + '<|eot_id|>' }}"
    "{%- for message in messages %}"
    "{{- '<|start_header_id|>' + message['role'] + '<|end_header_id|>\n\n' }}"
    "{%- if message['role'] == 'assistant' %}{% generation %}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{% endgeneration %}{%- else %}"
    "{{- message['content'] | trim + '<|eot_id|>' }}{%- endif %}{%- endfor %}"
    "{%- if add_generation_prompt %}"
    "{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}"
)
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\n'}}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '<|im_end|>' + '\n'}}{% endgeneration %}{% else %}"
    "{{ message['content'] + '<|im_end|>' + '\n'}}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
ZEPHYR = (
    "{% for message in messages %}{% if message['role'] == 'user' %}"
    "{{ '<|user|>\n' + message['content'] + eos_token + '\n' }}"
    "{% elif message['role'] == 'system' %}"
    "{{ '<|system|>\n' + message['content'] + eos_token + '\n' }}"
    "{% elif message['role'] == 'assistant' %}{{ '<|assistant|>\n' }}{% generation %}"
    "{{ message['content'] + eos_token + '\n' }}{% endgeneration %}{% endif %}"
    "{% if loop.last and add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0]['role'] == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "{% if (message['role'] == 'assistant') %}{{ '<start_of_turn>model\n' }}{% generation %}"
    "{{ message['content'] | trim + '<end_of_turn>\n' }}{% endgeneration %}{% else %}"
    "{{ '<start_of_turn>' + message['role'] + '\n' + message['content'] | trim + "
    "'<end_of_turn>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{'<start_of_turn>model\n'}}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for message in messages %}"
    "{% if (message['role'] == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Conversation roles must alternate user/assistant/user/...') }}{% endif %}"
    "{% if message['role'] == 'user' %}{{ '[INST] ' + message['content'] + ' [/INST]' }}"
    "{% elif message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + eos_token}}{% endgeneration %}{% endif %}{% endfor %}"
)
TEXT = (  # whose turns end with text, in no vocabulary
    "{% for message in messages %}{{ '### ' + message['role'] + ':\n' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}"
    "{{ message['content'] + '\n### End\n' }}{% endgeneration %}{% else %}"
    "{{ message['content'] + '\n### End\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '### assistant:\n' }}{% endif %}"
)
ENDLESS = (
    "{% for message in messages %}{{ message['role'] + ': ' }}"
    "{% if message['role'] == 'assistant' %}{% generation %}{{ message['content'] + '\n' }}"
    "{% endgeneration %}{% else %}{{ message['content'] + '\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
CORPUS = [
    "yes no hello what is the answer to this question and how are you today",
    "system user assistant model Today Date: 26 Jul 2024 ### End: \n\n a list of words, is it?",
    "no\n\n\n yes\n\n\n no\n\n\n yes\n\n\n no",
] * 4


def trained(kind: str, special: list[str]) -> Tokenizer:
    """A tokenizer with merges, of a kind that checkpoints bring."""
    tokenizer = Tokenizer(models.BPE(unk_token=None if kind == "bytes" else "<unk>"))
    alphabet = sorted(
        {character for text in CORPUS for character in text} | set("<|>/[]_xyz-7INST")
    )
    if kind == "bytes":  # GPT-2, Llama 3, Qwen
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
    elif kind in ("first", "always"):  # Mistral, Zephyr
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=kind, split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme=kind, split=False)
    elif kind == "prepend":  # Llama 2
        tokenizer.normalizer = normalizers.Sequence(
            [normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")]
        )
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse()])
    else:  # Gemma
        assert kind == "replace"
        tokenizer.normalizer = normalizers.Replace(" ", "▁")
        tokenizer.decoder = decoders.Replace("▁", " ")
    trainer = trainers.BpeTrainer(
        vocab_size=len(alphabet) + len(special) + 60, special_tokens=["<unk>", *special],
        initial_alphabet=[*alphabet, "▁"], show_progress=False,
    )  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def a_tokenizer(template, kind, *, bos=None, eos, others=(), adds_bos=True):
    special = [token for token in (bos, eos, *others) if token]
    backend = trained(kind, special)
    if bos and adds_bos:
        backend.post_processor = processors.TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, backend.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend, bos_token=bos, eos_token=eos, pad_token=eos,
        extra_special_tokens=list(others), chat_template=template,
    )  # fmt: skip


LLAMA3_TOKENS = ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>")
KINDS = {
    "llama3": lambda: a_tokenizer(LLAMA3, "bytes", bos="<|begin_of_text|>",
                                  eos="<|end_of_text|>", others=LLAMA3_TOKENS),
    "chatml": lambda: a_tokenizer(CHATML, "bytes", eos="<|endoftext|>",
                                  others=("<|im_start|>", "<|im_end|>")),
    "chatml_bos": lambda: a_tokenizer(CHATML, "first", bos="<s>", eos="</s>",
                                      others=("<|im_start|>", "<|im_end|>")),
    "zephyr_first": lambda: a_tokenizer(ZEPHYR, "first", bos="<s>", eos="</s>"),
    "zephyr_always": lambda: a_tokenizer(ZEPHYR, "always", bos="<s>", eos="</s>"),
    "zephyr_llama2": lambda: a_tokenizer(ZEPHYR, "prepend", bos="<s>", eos="</s>"),
    "gemma": lambda: a_tokenizer(GEMMA, "replace", bos="<bos>", eos="<eos>",
                                 others=("<start_of_turn>", "<end_of_turn>")),
    "mistral": lambda: a_tokenizer(MISTRAL, "first", bos="<s>", eos="</s>",
                                   others=("[INST]", "[/INST]")),
    "mistral_v1": lambda: a_tokenizer(MISTRAL, "prepend", bos="<s>", eos="</s>"),
    "text": lambda: a_tokenizer(TEXT, "bytes", bos="<s>", eos="</s>"),
    "endless": lambda: a_tokenizer(ENDLESS, "first", bos="<s>", eos="</s>"),
}  # fmt: skip


def messages(turns):
    return [{"role": role, "content": text} for role, text in turns]


def unmarked(tokenizer):
    """The same template without its generation blocks, as most checkpoints have it."""
    tokenizer.chat_template = re.sub(r"{% (end)?generation %}", "", tokenizer.chat_template)
    return tokenizer


def save_model(folder, kind, **settings):
    """A checkpoint of a tiny random Llama with this tokenizer; returns its folder."""
    tokenizer = unmarked(KINDS[kind]())
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    config = LlamaConfig(
        vocab_size=len(tokenizer), num_attention_heads=4, num_key_value_heads=2,
        max_position_embeddings=256, bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id, **{**sizes, **settings},
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)
