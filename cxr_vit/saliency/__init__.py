"""Maps of an image: which parts a model's answer for a finding rests on."""
