"""Text-video retrieval: embedding, matching, training and ranking."""

from tokenmix_ops.video.retrieval.ranking import Scores, rank
from tokenmix_ops.video.retrieval.retriever import EncodedVideos, VideoRetriever
from tokenmix_ops.video.retrieval.training import RetrievalTraining

__all__ = ["EncodedVideos", "RetrievalTraining", "Scores", "VideoRetriever", "rank"]
