"""Language models and vision-language models of transformers as policies that answer."""
