"""BERT and ALBERT with ContraNorm, registered with transformers' Auto classes when this package is imported."""

# ruff: noqa: F401 - the names that users import

import sys

if "BERT_glue.main" not in sys.orig_argv:  # `python -m BERT_glue.main` loads them itself, once its flags are checked
    from BERT_glue.configuration import ContraNormAlbertConfig, ContraNormBertConfig, with_contranorm
    from BERT_glue.modeling_albert import (
        ContraNormAlbertForMaskedLM,
        ContraNormAlbertForMultipleChoice,
        ContraNormAlbertForPreTraining,
        ContraNormAlbertForQuestionAnswering,
        ContraNormAlbertForSequenceClassification,
        ContraNormAlbertForTokenClassification,
        ContraNormAlbertModel,
    )
    from BERT_glue.modeling_bert import (
        ContraNormBertForMaskedLM,
        ContraNormBertForMultipleChoice,
        ContraNormBertForNextSentencePrediction,
        ContraNormBertForPreTraining,
        ContraNormBertForQuestionAnswering,
        ContraNormBertForSequenceClassification,
        ContraNormBertForTokenClassification,
        ContraNormBertModel,
    )
    from BERT_glue.sites import DIGITS, SITES, active_sites
