# Copyright 2026 The transformers-cee authors.
# Licensed under the Apache License, Version 2.0; see LICENSE.
from typing import Any

import families
import pytest
from bulk_reference import draw_texts, tokenizer_for
from transformers import PreTrainedTokenizerFast


@pytest.fixture(scope="session")
def texts() -> list[str]:
    return draw_texts(40)


@pytest.fixture(scope="session")
def model() -> Any:
    return families.model("bert_cee")


@pytest.fixture(scope="session")
def tokenizer(model: Any) -> PreTrainedTokenizerFast:
    return tokenizer_for(model)
