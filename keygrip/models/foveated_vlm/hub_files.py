"""Files of an exported video-language model, besides its weights, in the layout of the Hugging Face hub."""

from __future__ import annotations

from typing import Any

from keygrip.models.language.tokenizers import NAMED_TOKENS

MODEL_TYPE = "keygrip_video_language"
# Prepended to the language model's own template, which supports text alone: a message that is a list of items becomes
# its words, with <image> or <video> for such an item. These have no tokens: KeygripProcessor removes them, and the
# model places the visual tokens.
ITEMS = (
    "{%- set said = namespace(messages=[]) -%}"
    "{%- for message in messages -%}"
    "{%- set words = namespace(text='') -%}"
    "{%- if message['content'] is string -%}{%- set words.text = message['content'] -%}"
    "{%- else -%}{%- for item in message['content'] -%}"
    "{%- if item['type'] == 'text' -%}{%- set words.text = words.text + item['text'] -%}"
    "{%- else -%}{%- set words.text = words.text + '<' + item['type'] + '>' -%}{%- endif -%}"
    "{%- endfor -%}{%- endif -%}"
    "{%- set said.messages = said.messages + [{'role': message['role'], 'content': words.text}] -%}"
    "{%- endfor -%}"
    "{%- set messages = said.messages -%}"
)


def chat_template(own: str, system: str | None) -> str:
    """Return the chat template of an export: it accepts messages of text and of items, and adds the system turn of
    training to a conversation without one.

    Args:
        own: the language model's template. system: the words of the system turn; None: that of `own`.
    """
    if system is None:
        return ITEMS + own
    # Jinja parses Python's repr of a string as the same string.
    turn = f"{{'role': 'system', 'content': {system!r}}}"
    statement = f"{{%- set messages = [{turn}] + messages -%}}"
    return f"{ITEMS}{{%- if not messages or messages[0]['role'] != 'system' -%}}{statement}{{%- endif -%}}{own}"


def hub_files(module: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return files by name, and entries of config.json. `module` is a `FoveatedVLMModule`.

    tokenizer.json, tokenizer_config.json and chat_template.jinja are what transformers' AutoTokenizer reads, for
    messages of text and of items; processor_config.json is what its AutoProcessor reads
    (`keygrip.inference.processor`): how images become inputs and their position in a conversation;
    generation_config.json defines how answers end.
    """
    tokenizer, network, images = module.tokenizer, module.network, module.image_options
    state = tokenizer.state()
    files: dict[str, Any] = {
        "tokenizer.json": state["tokenizer"],
        "chat_template.jinja": chat_template(state["chat_template"], module.collator.system),
        "tokenizer_config.json": {
            "tokenizer_class": "PreTrainedTokenizerFast",
            **{token: state[name] for name, token in NAMED_TOKENS.items() if name in state},
            "model_max_length": network.language.context,
            "clean_up_tokenization_spaces": False,
        },
        "generation_config.json": {
            "eos_token_id": sorted(tokenizer.stop_tokens),
            "do_sample": False,
            "max_new_tokens": 64,
        },
        "processor_config.json": {  # arguments of `keygrip.inference.processor.KeygripProcessor`
            "processor_class": "KeygripProcessor",
            "image_size": images["image_size"],
            "fit": images["fit"],
            "max_frames": images["max_frames"],
            "image_frames": images.get("image_frames", 1),
            "image_mean": list(network.backbone.mean),
            "image_std": list(network.backbone.std),
            "prompt_order": module.collator.prompt_order,
            "system": module.collator.system,
            "timestamps": module.collator.timestamps,
        },
    }
    facts = {
        "model_type": MODEL_TYPE,
        "architectures": [type(network).__name__],
        "library_name": "keygrip",
        "vocab_size": network.language.vocabulary,
        "hidden_size": network.language.width,
        "max_position_embeddings": network.language.context,
    }
    return files, facts
