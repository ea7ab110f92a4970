"""What tests share: models, pipelines, peers, stubs, and processes that are killed."""
