"""The systems that came before BERT, each in one file: hmm, crf, bilstm_crf."""
