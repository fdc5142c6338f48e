"""The parts of a preparation: settings, plan, samples, the Ray chain, the ledger. `pipelines.prepare` orders them."""
