-- Drops items that nobody waits for any more; those being computed are dropped when they are answered.
-- ARGV: items
-- Returns how many were there.
local dropped = 0
for _, id in ipairs(ARGV) do
  local item = get_item(id)
  if item then
    forget(id, item)
    dropped = dropped + 1
  end
end
count('cancelled', dropped)
return dropped
