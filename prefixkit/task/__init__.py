"""What a prefix was trained to read and write, in code: every prompt is encoded here, in training and in serving.

`load_tokenizer` reads a model folder, `load_task` finds a ready-made task or a TOML file, `encode_prompt`,
`encode_target` and `encode_context` turn text into the ids that `prefixkit.format.manifest.TaskRecord` promises.
"""

from __future__ import annotations

from prefixkit.task.catalogue import load_task as load_task
from prefixkit.task.chat import chat_template_hash as chat_template_hash
from prefixkit.task.chat import render_chat as render_chat
from prefixkit.task.context import encode_context as encode_context
from prefixkit.task.encode import Fields as Fields
from prefixkit.task.encode import answer_ids as answer_ids
from prefixkit.task.encode import check_task as check_task
from prefixkit.task.encode import decode_target as decode_target
from prefixkit.task.encode import encode_prompt as encode_prompt
from prefixkit.task.encode import encode_target as encode_target
from prefixkit.task.encode import fit_prompt as fit_prompt
from prefixkit.task.encode import input_fields as input_fields
from prefixkit.task.encode import slots_of as slots_of
from prefixkit.task.encode import spelled_ids as spelled_ids
from prefixkit.task.encode import stop_ids as stop_ids
from prefixkit.task.encode import without_slots as without_slots
from prefixkit.task.images import image_task as image_task
from prefixkit.task.located import CHOICE as CHOICE
from prefixkit.task.located import LocatedPrompt as LocatedPrompt
from prefixkit.task.located import fit_choice as fit_choice
from prefixkit.task.located import locate as locate
from prefixkit.task.tokenizer import SLOT_ID as SLOT_ID
from prefixkit.task.tokenizer import ModelTokenizer as ModelTokenizer
from prefixkit.task.tokenizer import load_tokenizer as load_tokenizer
from prefixkit.task.words import encode_words as encode_words
