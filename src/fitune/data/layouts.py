"""The named conversation layouts, as jinja: data, no logic.

Each works in transformers' apply_chat_template, too, since an exported model carries the layout it was trained with
as its chat template. `-` at the tags takes all white space of this file away; every character of the layout stands
in a string.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import NamedTuple


class Layout(NamedTuple):
    """One layout.

    Args:
        source: the jinja text.
        needs: special tokens that the tokenizer must have.
        first: special token that stands first, and after it the one two ids further: [gMASK] and sop, by any name.
        writes_bos: it begins with bos by itself; before the others comes whatever the tokenizer puts in front.
        last_answer_only: earlier answers are part of the prompt, in one piece with what stands around them, and not
            learnt.
    """

    source: str
    needs: tuple[str, ...] = ()
    first: str | None = None
    writes_bos: bool = False
    last_answer_only: bool = False


def write_first(tokens: Sequence[str]) -> str:
    """Jinja that writes special tokens."""
    return "{{- " + json.dumps("".join(tokens)) + " -}}"


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

# ChatGLM3. The space after the line break is SentencePiece's dummy space: the original encodes role and content apart.
# `metadata` names a called tool. What begins the next turn ends an answer. `plain` and `tools_json` are keys of a
# system turn that fitune fills from rows with tools; the original has a list `tools` there, transformers one beside it.
_CHATGLM3 = r"""
{%- set opening = 'Answer the following questions as best as you can. You have access to the following tools:' -%}
{%- if tools and messages[0]['role'] != 'system' -%}
  {{- '<|system|>\n ' + opening + '\n' + tools | tojson(indent=4) -}}
{%- endif -%}
{%- for message in messages -%}
  {%- set role = 'observation' if message['role'] == 'tool' else message['role'] -%}
  {%- set content = message['content'] -%}
  {%- set offered = message['tools'] or (tools if loop.first and role == 'system') -%}
  {%- if message['tools_json'] is string -%}
    {%- set content = (message['plain'] or opening) + '\n' + message['tools_json'] -%}
  {%- elif offered -%}
    {%- set content = content + '\n' + offered | tojson(indent=4) -%}
  {%- endif -%}
  {%- set metadata = message['metadata'] if message['metadata'] is string else '' -%}
  {%- set text = metadata + '\n' + (' ' + content if content else '') -%}
  {{- '<|' + role + '|>' -}}
  {%- if role == 'assistant' -%}
    {%- generation -%}{{- text -}}{%- endgeneration -%}
  {%- else -%}
    {{- text -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|assistant|>' -}}{%- endif -%}
"""

# ChatGLM2. Everything before the answer is one text, rounds count from 1.
_CHATGLM2 = r"""
{%- set count = namespace(rounds=0) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' -%}
    {%- set count.rounds = count.rounds + 1 -%}
    {{- '[Round ' ~ count.rounds ~ ']\n\n问：' + message['content'] + '\n\n答：' -}}
  {%- elif message['role'] == 'assistant' -%}
    {%- generation -%}{{- message['content'] -}}{%- endgeneration -%}
    {%- if not loop.last -%}{{- '\n\n' -}}{%- endif -%}
  {%- else -%}
    {{- raise_exception('ChatGLM2 has no ' + message['role'] + ' turns; write them into the user turn') -}}
  {%- endif -%}
{%- endfor -%}
"""

# ChatGLM-6B, the first version. One question stands as it is, several are rounds from 0 on; then the blank, its answer.
_CHATGLM = r"""
{%- set asked = messages | selectattr('role', 'equalto', 'user') | list | length -%}
{%- set count = namespace(rounds=0) -%}
{%- for message in messages -%}
  {%- if message['role'] == 'user' and asked == 1 -%}
    {{- message['content'] -}}
  {%- elif message['role'] == 'user' -%}
    {{- '[Round ' ~ count.rounds ~ ']\n问：' + message['content'] + '\n答：' -}}
    {%- set count.rounds = count.rounds + 1 -%}
  {%- elif message['role'] == 'assistant' and loop.last and not add_generation_prompt -%}
    {{- '[gMASK]' + bos_token -}}
    {%- generation -%}{{- message['content'] + eos_token -}}{%- endgeneration -%}
  {%- elif message['role'] == 'assistant' -%}
    {{- message['content'] + '\n' -}}
  {%- else -%}
    {{- raise_exception('ChatGLM-6B has no ' + message['role'] + ' turns; write them into the user turn') -}}
  {%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '[gMASK]' + bos_token -}}{%- endif -%}
"""

LAYOUTS = {
    "tutorial": Layout(_TUTORIAL),
    "alpaca": Layout(_ALPACA),
    "chatml": Layout(_CHATML, ("<|im_start|>", "<|im_end|>")),
    "llama3": Layout(_LLAMA3, ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"), writes_bos=True),
    "chatglm3": Layout(
        _CHATGLM3, ("[gMASK]", "<|system|>", "<|user|>", "<|assistant|>", "<|observation|>"), first="[gMASK]"
    ),
    "chatglm": Layout(
        _CHATGLM, ("[gMASK]", "<eop>", "<dBLOCK>"), first="[gMASK]", writes_bos=True, last_answer_only=True
    ),
    "chatglm2": Layout(_CHATGLM2, ("[gMASK]",), first="[gMASK]", last_answer_only=True),
}
