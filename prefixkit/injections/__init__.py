"""What a frozen backbone can receive: the one seam between methods and everything that consumes their results.

Axis names: batch, seq, prefix, hidden, layer, kv_heads, head_dim.
"""

from __future__ import annotations

from prefixkit.injections.combined import Combined as Combined
from prefixkit.injections.combined import Injection as Injection
from prefixkit.injections.combined import One as One
from prefixkit.injections.combined import Received as Received
from prefixkit.injections.combined import Several as Several
from prefixkit.injections.combined import joined as joined
from prefixkit.injections.combined import part_of as part_of
from prefixkit.injections.combined import parts_of as parts_of
from prefixkit.injections.combined import positions_of as positions_of
from prefixkit.injections.key_value_prefix import KeyValuePrefix as KeyValuePrefix
from prefixkit.injections.key_value_prefix import KeyValuePrefixes as KeyValuePrefixes
from prefixkit.injections.packed import PackedPrefixes as PackedPrefixes
from prefixkit.injections.packed import packed_prefixes as packed_prefixes
from prefixkit.injections.parameters import ParameterDelta as ParameterDelta
from prefixkit.injections.parameters import TaskHead as TaskHead
from prefixkit.injections.prompts import EmbeddingPrompt as EmbeddingPrompt
from prefixkit.injections.prompts import HiddenPrompt as HiddenPrompt
from prefixkit.injections.rows import RowPrefixes as RowPrefixes
from prefixkit.injections.rows import row_prefixes as row_prefixes
from prefixkit.injections.stored import embedding_prompt as embedding_prompt
from prefixkit.injections.stored import injection as injection
from prefixkit.injections.stored import key_value_prefix as key_value_prefix
from prefixkit.injections.stored import records_of as records_of
