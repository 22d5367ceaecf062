# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
"""BERT with exits."""

from transformers_cee.models.bert_cee.configuration_bert_cee import BertCeeConfig
from transformers_cee.models.bert_cee.modeling_bert_cee import BertForConsistentEE


__all__ = ["BertCeeConfig", "BertForConsistentEE"]
