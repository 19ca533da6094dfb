"""The plain torch form of every merging method but DC-Merge, as its paper or published code computes it.

They work in the dtype of their input: in float32 they are the rivals, in float64 the truth that answers are checked
against. Selections by ``topk``, diagonal matrices as broadcasts, no copy that torch does not need. None multiplies by
the method's scale.
"""
