"""From a corpus to answers, on Ray: preparation, training, evaluation, serving."""
