"""In the data centre: the target model on a paged KV cache, the engine, the gRPC service."""
