"""What any training needs: averages, checkpoints, log, progress. Knows no pictures, noise or networks."""
