"""BERT and ALBERT with ContraNorm, registered with transformers' Auto classes when this package is imported."""

# ruff: noqa: F401 - the names that users import

import sys

if not {"BERT_glue.main", "BERT_glue.predict"} & set(sys.orig_argv):  # these load them once their flags are checked
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
