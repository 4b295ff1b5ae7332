"""What any training needs: averages, checkpoints, log, progress. It knows nothing of pictures, noise or networks."""
