"""The study of formats: what each loses on a model's own tensors, what theory predicts, and which one to use."""
