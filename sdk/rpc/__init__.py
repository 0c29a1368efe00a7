"""The wire: edgecloud.proto, the code generated from it (`make proto`), and the codec between messages and types."""
