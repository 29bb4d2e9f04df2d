#!/bin/sh
# PEFT cannot put LoRA into Grounding DINO as transformers has it: NotImplementedError, whatever the target.
#
# peft 0.21.2 with transformers 5.20.2 and torch 2.13.0.
# get_peft_model looks for weights that are tied to the input embeddings and asks the model for them.
# GroundingDinoModel (and MMGroundingDinoModel) has no get_input_embeddings of its own, and the general one raises
# NotImplementedError instead of giving None, so that not even LoRA on the text encoder's query layers alone can be made.
# OWL-ViT and CLIP work. A method that gives the text backbone's embeddings is all that is missing.
set -eu
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cd "$folder"
python3 -m venv venv
venv/bin/pip install -q torch==2.13.0
venv/bin/pip install -q torch==2.13.0 transformers==5.20.2 peft==0.21.2
venv/bin/python - <<'PYTHON'
import sys
import transformers
from transformers import (BertConfig, CLIPConfig, CLIPModel, GroundingDinoConfig, GroundingDinoForObjectDetection, OwlViTConfig,
                          OwlViTForObjectDetection, SwinConfig)
from peft import LoraConfig, get_peft_model

transformers.logging.set_verbosity_error()
tower = dict(hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2)
both = dict(text_config=dict(**tower, vocab_size=50), vision_config=dict(**tower, image_size=32, patch_size=8), projection_dim=32)

def grounding_dino():
    swin = SwinConfig(image_size=32, embed_dim=8, depths=[1] * 4, num_heads=[1] * 4, window_size=2, out_indices=[2, 3, 4])
    bert = BertConfig(**tower, vocab_size=50)
    return GroundingDinoForObjectDetection(GroundingDinoConfig(
        backbone_config=swin, text_config=bert, d_model=32, encoder_layers=1, decoder_layers=2, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=16, decoder_ffn_dim=16, num_queries=5))

def adapt(model, targets):
    try:
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=targets))
    except NotImplementedError as error:
        return f"NotImplementedError: {error}"
    return f"{sum('lora_A' in name for name, _ in adapted.named_parameters())} layers adapted"

helped = grounding_dino()
helped.model.get_input_embeddings = lambda: helped.model.text_backbone.embeddings.word_embeddings
seen = {"CLIP": adapt(CLIPModel(CLIPConfig(**both)), ["q_proj"]),
        "OWL-ViT": adapt(OwlViTForObjectDetection(OwlViTConfig(**both)), ["q_proj"]),
        "Grounding DINO": adapt(grounding_dino(), ["query", "value"]),
        "Grounding DINO, text only": adapt(grounding_dino(), r".*text_backbone.*query"),
        "Grounding DINO with the method added": adapt(helped, r".*text_backbone.*query")}
for name, outcome in seen.items():
    print(f"{name}: {outcome}")
fails = [name for name, outcome in seen.items() if outcome.startswith("NotImplementedError: `get_input_embeddings`")]
as_seen = fails == ["Grounding DINO", "Grounding DINO, text only"]
sys.exit(0 if as_seen else "no longer as described")
PYTHON
