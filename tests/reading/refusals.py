"""A refusal of weights: one line that names the file and advises nothing unsafe."""

ADVICE = ("weights_only", "add_safe_globals", "safe_globals", "torch.load", "\x1b", "trust")


def one_line(error, path):
    text = str(error.value if hasattr(error, "value") else error)
    assert path.name in text
    assert "\n" not in text
    assert len(text) < 600
    assert not any(word in text for word in ADVICE), text
    return text
