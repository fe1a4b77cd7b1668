"""Prompt formats by name, for checkpoints that bring no chat template of their own: Jinja sources and stop tokens.

Text between control tokens is encoded on its own, as the code these formats come from does; begin and end of a turn are
ids. Sources: llama2 and codellama-70b: generation.py of Meta's llama and codellama; vicuna, wizardlm: FastChat's
conversation.py (v1.1); alpaca: Stanford's train.py; wizardlm-7b, wizardcoder, wizardmath, orca2: the models' cards.
"""

from dataclasses import dataclass
from typing import Literal, get_args

PromptFormatName = Literal[
    "llama2",
    "codellama-70b",
    "vicuna",
    "wizardlm",
    "wizardlm-7b",
    "wizardcoder",
    "wizardmath",
    "wizardmath-cot",
    "alpaca",
    "orca2",
]


@dataclass(frozen=True, slots=True)
class PromptFormat:
    """How messages become a prompt."""

    template: str  # Jinja
    stop_tokens: tuple[str, ...] = ()  # control tokens that end an answer, beside the tokenizer's own


# Every format: an optional system message first, then user and assistant in turn, a user's message last.
TURNS = """
{%- set system = messages[0].content if messages[0].role == 'system' else none -%}
{%- set turns = messages[1:] if messages[0].role == 'system' else messages -%}
{%- if not turns or turns[-1].role != 'user' -%}
  {{- raise_exception('the last message must be from the user') -}}
{%- endif -%}
{%- for message in turns -%}
  {%- if message.role != ('user' if loop.index0 % 2 == 0 else 'assistant') -%}
    {{- raise_exception('after an optional system message, user and assistant must alternate, the user first') -}}
  {%- endif -%}
{%- endfor -%}
"""

SINGLE = (
    TURNS
    + """
{%- if turns | length > 1 -%}
  {{- raise_exception('this model has no format for conversations: send one user message') -}}
{%- endif -%}
{%- set instruction = turns[0].content -%}
"""
)

LLAMA2 = (
    TURNS
    + """
{%- for message in messages -%}
  {%- for tag in ['[INST]', '[/INST]', '<<SYS>>', '<</SYS>>'] if tag in message.content -%}
    {{- raise_exception('special tags are not allowed as part of the prompt: ' + tag) -}}
  {%- endfor -%}
{%- endfor -%}
{%- for message in turns -%}
  {%- if message.role == 'user' -%}
    {%- set folded = loop.first and system is not none -%}
    {%- set content = '<<SYS>>\\n' + system + '\\n<</SYS>>\\n\\n' + message.content if folded else message.content -%}
    {{- bos_token + '[INST] ' + content.strip() + ' [/INST]' -}}
  {%- else -%}
    {{- ' ' + message.content.strip() + ' ' + eos_token -}}
  {%- endif -%}
{%- endfor -%}
"""
)

CODELLAMA_70B = (
    TURNS
    + """
{{- bos_token -}}
{%- for message in messages -%}
  {{- 'Source: ' + message.role + '\\n\\n ' + message.content.strip() + '<step>' -}}
{%- endfor -%}
{{- 'Source: assistant\\nDestination: user\\n\\n ' -}}
"""
)

VICUNA = (
    TURNS
    + """
{%- set default = "A chat between a curious user and an artificial intelligence assistant. " +
    "The assistant gives helpful, detailed, and polite answers to the user's questions." -%}
{{- bos_token + (default if system is none else system) + ' ' -}}
{%- for message in turns -%}
  {%- if message.role == 'user' -%}
    {{- 'USER: ' + message.content + ' ' -}}
  {%- else -%}
    {{- 'ASSISTANT: ' + message.content + eos_token -}}
  {%- endif -%}
{%- endfor -%}
{{- 'ASSISTANT:' -}}
"""
)

ALPACA_INTRODUCTION = "Below is an instruction that describes a task. "
ALPACA_REQUEST = "Write a response that appropriately completes the request."

ALPACA = (
    SINGLE
    + f"""
{{%- if system is none -%}}
  {{{{- bos_token + '{ALPACA_INTRODUCTION}{ALPACA_REQUEST}\\n\\n### Instruction:\\n' + instruction -}}}}
{{%- else -%}}
  {{{{- bos_token + 'Below is an instruction that describes a task, paired with an input that provides further '
     + 'context. {ALPACA_REQUEST}\\n\\n### Instruction:\\n' + system + '\\n\\n### Input:\\n' + instruction -}}}}
{{%- endif -%}}
{{{{- '\\n\\n### Response:' -}}}}
"""
)


def _instruction(before: str, after: str) -> str:
    """One instruction between fixed texts; a system message goes before it, for these models were trained without."""
    return (
        SINGLE
        + f"""
{{%- set instruction = instruction if system is none else system + '\\n\\n' + instruction -%}}
{{{{- bos_token + '{before}' + instruction + "{after}" -}}}}
"""
    )


WIZARD_BEFORE = f"{ALPACA_INTRODUCTION}{ALPACA_REQUEST}\\n\\n### Instruction:\\n"

ORCA2 = (
    TURNS
    + """
{%- set default = 'You are Orca, an AI language model created by Microsoft. You are a cautious assistant. ' +
    'You carefully follow instructions. You are helpful and harmless and you follow ethical guidelines and promote ' +
    'positive behavior.' -%}
{{- bos_token + '<|im_start|>system\\n' + (default if system is none else system) + '<|im_end|>\\n' -}}
{%- for message in turns -%}
  {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' -}}
{%- endfor -%}
{{- '<|im_start|>assistant' -}}
"""
)

PROMPT_FORMATS: dict[PromptFormatName, PromptFormat] = {
    "llama2": PromptFormat(LLAMA2),
    "codellama-70b": PromptFormat(CODELLAMA_70B, ("<step>",)),
    "vicuna": PromptFormat(VICUNA),
    "wizardlm": PromptFormat(VICUNA),
    "wizardlm-7b": PromptFormat(_instruction("", "\\n\\n### Response:")),
    "wizardcoder": PromptFormat(_instruction(WIZARD_BEFORE, "\\n\\n### Response:")),
    "wizardmath": PromptFormat(_instruction(WIZARD_BEFORE, "\\n\\n### Response:")),
    "wizardmath-cot": PromptFormat(_instruction(WIZARD_BEFORE, "\\n\\n### Response: Let's think step by step.")),
    "alpaca": PromptFormat(ALPACA),
    "orca2": PromptFormat(ORCA2, ("<|im_end|>",)),
}
assert set(PROMPT_FORMATS) == set(get_args(PromptFormatName))
