"""Every number of a model beside those of transformers: compare, judge, show."""
