-- A worker gives up its claims.
-- ARGV: 1 if the delivery counts (it failed), 0 if it was never tried; then the claims
for i = 2, #ARGV do
  lapse(ARGV[i], ARGV[1] == '1')
end
return #ARGV - 1
