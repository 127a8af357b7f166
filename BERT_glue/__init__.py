"""BERT and ALBERT with ContraNorm, registered with transformers' Auto classes when this package is imported."""

from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForMaskedLM,
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
)

from BERT_glue.configuration import ContraNormAlbertConfig, ContraNormBertConfig, with_contranorm
from BERT_glue.modeling_albert import (
    ContraNormAlbertForMaskedLM,
    ContraNormAlbertForSequenceClassification,
    ContraNormAlbertForTokenClassification,
    ContraNormAlbertModel,
)
from BERT_glue.modeling_bert import (
    ContraNormBertForMaskedLM,
    ContraNormBertForSequenceClassification,
    ContraNormBertForTokenClassification,
    ContraNormBertModel,
)
from BERT_glue.sites import DIGITS, SITES, active_sites

for _config in (ContraNormBertConfig, ContraNormAlbertConfig):
    AutoConfig.register(_config.model_type, _config)
for _auto, _models in (
    (AutoModel, (ContraNormBertModel, ContraNormAlbertModel)),
    (AutoModelForMaskedLM, (ContraNormBertForMaskedLM, ContraNormAlbertForMaskedLM)),
    (
        AutoModelForSequenceClassification,
        (ContraNormBertForSequenceClassification, ContraNormAlbertForSequenceClassification),
    ),
    (AutoModelForTokenClassification, (ContraNormBertForTokenClassification, ContraNormAlbertForTokenClassification)),
):
    for _model in _models:
        _auto.register(_model.config_class, _model)

__all__ = [
    "DIGITS",
    "SITES",
    "ContraNormAlbertConfig",
    "ContraNormAlbertForMaskedLM",
    "ContraNormAlbertForSequenceClassification",
    "ContraNormAlbertForTokenClassification",
    "ContraNormAlbertModel",
    "ContraNormBertConfig",
    "ContraNormBertForMaskedLM",
    "ContraNormBertForSequenceClassification",
    "ContraNormBertForTokenClassification",
    "ContraNormBertModel",
    "active_sites",
    "with_contranorm",
]
