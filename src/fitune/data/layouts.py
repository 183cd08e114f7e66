"""The named conversation layouts, as jinja: data, no logic.

Each works in transformers' apply_chat_template, too, since an exported model carries the layout it was trained with
as its chat template. `-` at the tags takes all white space of this file away; every character of the layout stands
in a string.
"""

from __future__ import annotations

from typing import NamedTuple


class Layout(NamedTuple):
    """One layout.

    Args:
        source: the jinja text.
        needs: special tokens that the tokenizer must have.
        writes_bos: it begins with bos by itself; before the others comes whatever the tokenizer puts in front.
    """

    source: str
    needs: tuple[str, ...] = ()
    writes_bos: bool = False


# Human: / Assistant:, the layout of common courses for base models. Turns are joined by an empty line.
_TUTORIAL = r"""
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {{- message['content'] + '\n\n' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- 'Assistant: ' -}}
    {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
  {%- else -%}
    {%- if not loop.first and messages[loop.index0 - 1]['role'] == 'assistant' -%}{{- '\n\n' -}}{%- endif -%}
    {{- ('Tool: ' if message['role'] == 'tool' else 'Human: ') + message['content'] | trim + '\n\n' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'Assistant: ' -}}{%- endif -%}
"""

# Stanford alpaca. `instruction` and `input` are keys of a user turn that fitune fills from alpaca rows; without them
# the content is the instruction. A system text takes the place of the opening sentence.
_ALPACA = r"""
{%- for message in messages -%}
  {%- if message['role'] == 'system' -%}
    {{- message['content'] + '\n\n' -}}
  {%- elif message['role'] == 'assistant' -%}
    {{- '### Response:\n' -}}
    {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
  {%- elif message['role'] == 'tool' -%}
    {{- '\n\n### Tool:\n' + message['content'] + '\n\n' -}}
  {%- else -%}
    {%- set instruction = message['instruction'] if message['instruction'] is string else message['content'] -%}
    {%- set input = message['input'] if message['input'] is string else '' -%}
    {%- if loop.first -%}
      {{- 'Below is an instruction that describes a task' -}}
      {%- if input -%}{{- ', paired with an input that provides further context' -}}{%- endif -%}
      {{- '. Write a response that appropriately completes the request.\n\n' -}}
    {%- elif messages[loop.index0 - 1]['role'] == 'assistant' -%}
      {{- '\n\n' -}}
    {%- endif -%}
    {{- '### Instruction:\n' + instruction + '\n\n' -}}
    {%- if input -%}{{- '### Input:\n' + input + '\n\n' -}}{%- endif -%}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '### Response:\n' -}}{%- endif -%}
"""

_CHATML = r"""
{%- for message in messages -%}
  {{- '<|im_start|>' + message['role'] + '\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- message['content'] + '<|im_end|>' -}}{%- endgeneration -%}
  {%- else -%}
    {{- message['content'] + '<|im_end|>' -}}
  {%- endif -%}
  {{- '\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}
"""

_LLAMA3 = r"""
{%- if bos_token is string -%}{{- bos_token -}}{%- endif -%}
{%- for message in messages -%}
  {%- set role = 'ipython' if message['role'] == 'tool' else message['role'] -%}
  {{- '<|start_header_id|>' + role + '<|end_header_id|>\n\n' -}}
  {%- if message['role'] == 'assistant' -%}
    {%- generation -%}{{- message['content'] | trim + '<|eot_id|>' -}}{%- endgeneration -%}
  {%- else -%}
    {{- message['content'] | trim + '<|eot_id|>' -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' -}}{%- endif -%}
"""

LAYOUTS = {
    "tutorial": Layout(_TUTORIAL),
    "alpaca": Layout(_ALPACA),
    "chatml": Layout(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": Layout(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), writes_bos=True),
}
